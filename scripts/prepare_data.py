"""Makes a data set ready for training: .beton files and a manifest out of an image folder. See --help, and the README.

python scripts/prepare_data.py --dataset tiny-imagenet --source tiny-imagenet-200 --out data/tiny-imagenet
python scripts/prepare_data.py --dataset tiny-imagenet --download --out data/tiny-imagenet
python scripts/prepare_data.py --dataset miniplaces --source miniplaces --out data/miniplaces
python scripts/prepare_data.py --source imagenet --resize 64 --out data/imagenet-64
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without an install

from fastprune.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
