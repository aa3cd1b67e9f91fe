"""`python -m btm_scale.cli`: how launchers and job scripts call the command."""

from __future__ import annotations

from btm_scale.cli.app import main

if __name__ == "__main__":
    main()
