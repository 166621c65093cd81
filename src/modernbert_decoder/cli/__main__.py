"""`python -m modernbert_decoder.cli` is `mbd`."""

from __future__ import annotations

import sys

from modernbert_decoder.cli import main

sys.exit(main())
