"""`python -m hpd`, which is also what `accelerate launch -m hpd train recipe.yaml` runs."""

from hpd.cli import main

main()
