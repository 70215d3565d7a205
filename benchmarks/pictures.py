"""The pictures in README.md: the frontier of some runs, and the top of a report page.

    python benchmarks/pictures.py FOLDER [--model demo] [--calibration TEXT] [--eval TEXT]

Runs go to FOLDER, where those that are finished stay; pictures to docs/pictures. Nothing
else should run meanwhile, as it draws times. The page is photographed by Chromium.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = (("auto", 0.9), ("auto", 0.8), ("auto", 0.7), ("flap", 0.8), ("shortgpt", 0.8))
LIGHT = ("--samples", 32, "--eval-windows", 32)
SHOWN = "auto-0.8"
SIZE = (1000, 1240)


def secateur(*arguments: object) -> None:
    command = [sys.executable, "-m", "secateur", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT)


def photograph(page: Path, picture: Path, folder: Path) -> None:
    """The top of a page as PNG of few colours."""
    from PIL import Image

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        sys.exit(f"one of {', '.join(names)} is needed for the picture of the page")
    size = ",".join(map(str, SIZE))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'browser'}", f"--window-size={size}"]
    command += [f"--screenshot={picture}", f"file://{page.resolve()}"]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(picture) as found:
        found.convert("RGB").quantize(64).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="bundled")
    parser.add_argument("--eval", action="append", default=[])
    arguments = parser.parse_args()
    texts = [flag for text in arguments.eval for flag in ("--eval", text)]
    made = []
    for method, keep in RUNS:
        out = arguments.folder.resolve() / f"{method}-{keep}"
        made.append(out)
        if not out.exists():
            given = ("--method", method, "--keep", keep, "--calibration", arguments.calibration)
            secateur("compress", arguments.model, out, *given, *texts, *LIGHT)
    pictures = ROOT / "docs" / "pictures"
    pictures.mkdir(exist_ok=True)
    secateur("compare", *made, "--plot", pictures / "frontier.svg", "--overwrite")
    shown = arguments.folder.resolve() / SHOWN
    others = [flag for run in made if run != shown for flag in ("--siblings", run)]
    secateur("report", shown, *others)
    photograph(shown / "secateur" / "report.html", pictures / "report.png", arguments.folder)


if __name__ == "__main__":
    main()
