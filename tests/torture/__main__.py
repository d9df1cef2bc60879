"""`python tests/torture CAMPAIGN`: kills, damage, disks, fuzz, ranks; and `table`, what came of them."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import workplace  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("campaign", choices=("kills", "damage", "disks", "twice", "fuzz", "ranks", "table"))
    parser.add_argument(
        "--results", type=Path, default=Path("torture"), help="a folder of JSON lines; default ./torture"
    )
    parser.add_argument("--minutes", type=float, default=40, help="stop after so many; the next call goes on")
    parser.add_argument("--seeds", type=int, default=100, help="of kills: at most so many of each chain")
    parser.add_argument("--only", nargs="+", default=[], metavar="KIND", help="of kills: only these, such as rounds")
    parser.add_argument("--wanted", type=int, default=300, help="kills or launches; of fuzz, thousands of inputs")
    args = parser.parse_args()
    workplace.prepare_environment()
    if args.campaign == "table":
        from table import print_table

        print_table(args.results)
        return 0
    workplace.import_everything()
    root = Path(
        tempfile.mkdtemp(prefix="torture-")
    )  # a `TemporaryDirectory` would be removed by the first child's exit
    try:
        template = workplace.make_template(root / "template")
        results = args.results / f"{args.campaign}.jsonl"
        _run(args, template, root, results)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 0


def _run(args: argparse.Namespace, template: Path, root: Path, results: Path) -> None:
    import damage
    import disks
    import fuzz
    import kills
    import ranks
    import twice

    if args.campaign == "kills":
        kills.campaign(template, root, results, range(args.seeds), args.minutes, args.wanted, args.only)
    elif args.campaign == "damage":
        damage.campaign(template, root, results, args.minutes)
    elif args.campaign == "disks":
        disks.campaign(template, root, results, args.minutes)
    elif args.campaign == "twice":
        twice.campaign(template, root, results)
    elif args.campaign == "fuzz":
        fuzz.campaign(template, root, results, args.minutes, args.wanted)
    elif args.campaign == "ranks":
        ranks.campaign(template, root, results, args.minutes, args.wanted)


if __name__ == "__main__":
    sys.exit(main())
