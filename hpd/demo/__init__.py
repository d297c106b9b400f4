"""The demo: a task, a packaged pair and recipe, and how they were made."""
