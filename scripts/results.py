"""Writes docs/results.md from docs/results: `python scripts/results.py [--add RUN_FOLDER ...]`."""

import argparse
import json
import shutil
from pathlib import Path

from lm_zoo.eval.report import write_atomically
from lm_zoo.eval.results_page import results_page

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", type=Path, nargs="*", default=[], metavar="DIR", help="of `lm-zoo eval synthetic`")
    for folder in parser.parse_args().add:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        suffix = "" if content["budget"] == "cpu" else f"-{content['budget']}"
        for kind in ("json", "csv", "png"):
            name = f"{content['kind']}-{content['task']}{suffix}.{kind}"
            (DOCS / "results").mkdir(exist_ok=True)
            shutil.copyfile(folder / f"results.{kind}", DOCS / "results" / name)
    write_atomically(DOCS / "results.md", results_page(DOCS / "results").encode())


if __name__ == "__main__":
    main()
