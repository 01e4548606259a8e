"""What only instructors see: reference answers, wrong solutions, hostile submissions.

The answers import the taught code, which lies in the repository's root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
