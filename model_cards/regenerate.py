"""
Trains the models of this folder again and renews their cards and pictures:

    python model_cards/regenerate.py
    python model_cards/regenerate.py --only tiny-arithmetic-blockwise-grpo

Other arguments go to the example scripts. The models themselves stay in `outputs/`.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
CARDS = {
    "tiny-scenes-control-variate": ["tp_grpo.py"],
    "tiny-scenes-tp-grpo": ["tp_grpo.py", "--method", "tp_grpo"],
    "tiny-words-control-variate": ["tp_grpo.py", "--task", "words"],
    "tiny-covered-share-tdpo-r": ["tdpo_r.py"],
    "tiny-arithmetic-blockwise-grpo": ["blockwise_grpo.py"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CARDS), default=list(CARDS), help="names of cards")
    parser.add_argument("--folder", type=Path, default=ROOT / "model_cards", help="where the cards are written")
    arguments, others = parser.parse_known_args()
    for name in arguments.only:
        script, *options = CARDS[name]
        output = Path("outputs", name)
        command = [sys.executable, ROOT / "examples" / script, *options, "--output_dir", str(output), *others]
        subprocess.run(command, check=True)
        card = (output / "README.md").read_text(encoding="utf-8")
        target = arguments.folder / name
        shutil.rmtree(target, ignore_errors=True)
        for picture in re.findall(r"\]\((\S+\.png)\)|url: (\S+\.png)", card):
            path = Path(*picture)
            (target / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(output / path, target / path)
        (target / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
