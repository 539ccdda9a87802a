"""How a run talks, survives and spreads. Knows nothing of pronunciation."""

import logging

# PEFT imports bitsandbytes, which reports on import what a CPU lacks; no user of these scripts can act on it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
