"""The command btm-scale-lm-eval: lm-evaluation-harness with the model `btm-scale` in it, all else as it is.

The harness finds no models in other packages by itself, so this registers ours and hands over.
"""

from __future__ import annotations

from btm_scale.cli.exit_codes import end
from btm_scale.cli.safe_path import import_nothing_from_here
from btm_scale.errors import UserError


def main() -> None:
    """Run `lm_eval` with its own arguments, such as `--model btm-scale --model_args run=DIR,method=ensemble`."""
    import_nothing_from_here()
    try:
        from lm_eval.__main__ import cli_evaluate

        import btm_scale.generate.lm_eval  # noqa: F401 (it registers the model)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        end("lm_eval is not installed: pip install 'btm-scale[lm-eval]'", 2)
    try:
        cli_evaluate()
    except UserError as error:
        end(error, 2)


if __name__ == "__main__":
    main()
