"""`python -m flow_trl.metrics push --namespace user` pushes the metrics to the Hub, each as a Space."""

import argparse

from . import NAMES
from .spaces import push


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flow_trl.metrics", description="Metrics of flow_trl on the Hub.")
    command = parser.add_subparsers(dest="command", required=True).add_parser("push", help="pushes metrics as Spaces")
    command.add_argument("--namespace", required=True, help="user or organisation of the Hub")
    command.add_argument("--names", nargs="+", choices=NAMES, metavar="NAME", help="metrics (default: all)")
    command.add_argument("--private", action="store_true", help="makes new Spaces private")
    command.add_argument(
        "--requirement",
        default="flow-trl",
        help="what a Space installs as flow-trl, such as 'flow-trl @ git+https://...' (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for address in push(args.namespace, args.names, private=args.private, requirement=args.requirement):
        print(address)


if __name__ == "__main__":
    main()
