"""Train, validate and test:  python train.py fit --config configs/demo.yaml"""

import sys
from pathlib import Path

from core.starting import start

HELP = Path(__file__).parent / "pipeline" / "help.txt"  # needs no parser, which takes seconds


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    if not {"-h", "--help"}.isdisjoint(args):
        print(HELP.read_text(), end="")
        sys.exit()
    if any(arg.partition("=")[0] == "--on" for arg in args):
        from pipeline.kaggle.remote import run  # the work is elsewhere: no torch here
    else:
        start()
        from pipeline.cli import run

    run(args)


if __name__ == "__main__":
    main()
