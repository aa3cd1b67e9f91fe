"""Where a command starts: `btm-scale` at a shell, `python -m btm_scale.cli` in launchers and job scripts."""

from __future__ import annotations

from btm_scale.cli.streams import escape_unknown_characters, open_missing_streams
from btm_scale.util.stop_signal import leave_on_signal


def main() -> None:
    """Run the command."""
    leave_on_signal()
    open_missing_streams()
    escape_unknown_characters()
    from btm_scale.cli.app import main as run_command  # last, because the import takes most of a second

    run_command()


if __name__ == "__main__":
    main()
