"""Train, validate and test:  python train.py fit --config configs/demo.yaml"""

import sys

from core.threads import limit_spinning


def main(args: list[str] | None = None) -> None:
    limit_spinning()
    from pipeline.cli import run

    run(sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
