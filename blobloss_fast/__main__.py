"""`python -m blobloss_fast`: the demo."""

from .demo import main

if __name__ == "__main__":
    raise SystemExit(main())
