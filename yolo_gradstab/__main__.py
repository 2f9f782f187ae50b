"""`python -m yolo_gradstab`, the same as the `yolo-gradstab` command."""

import sys

from yolo_gradstab.cli import main

if __name__ == "__main__":
    sys.exit(main())
