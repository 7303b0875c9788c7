"""Train, validate and test:  python train.py fit --config configs/demo.yaml"""

import sys

from pipeline.cli import run


def main(args: list[str] | None = None) -> None:
    run(sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
