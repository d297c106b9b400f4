"""Known vulnerabilities of the installed packages, by pip-audit; success where they are out of reach."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys


def main() -> int:
    if importlib.util.find_spec("pip_audit") is None:
        print("audit skipped: pip-audit is not installed")
        return 0
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--skip-editable",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("audit skipped: the advisory service cannot be reached")
        return 0
    audited = [p for p in packages if "skip_reason" not in p]
    if not audited:
        print(
            f"audit skipped: the service knows none of {len(packages)} packages (an index that is not PyPI?)"
        )
        return 0
    found = [(p["name"], p["version"], v) for p in audited for v in p.get("vulns", ())]
    for name, version, hole in found:
        print(
            f"{name} {version}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'no release yet'}"
        )
    print(f"audit: {len(audited)} of {len(packages)} packages looked up, {len(found)} known holes")
    return 1 if any(hole["fix_versions"] for _, _, hole in found) else 0


if __name__ == "__main__":
    sys.exit(main())
