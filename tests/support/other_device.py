"""Methods on a streamed model whose layers compute on the emulated device: FAMILY COUNT METHOD ...

Writes one JSON line a method: what differs from the CPU with COUNT windows, and what was moved.
"""

import json
import sys
from functools import partial

from device_parity import compared
from emulated_device import BYTES, DEVICE, Emulating

from prunelight.models.placement import move_if_it_fits


def main(family, count, names):
    put = partial(move_if_it_fits, device=DEVICE, offload=True)
    for name in names:
        try:
            with Emulating():
                row = compared(name, family, put, DEVICE, num_windows=count, moved=BYTES)
        except Exception as error:  # of one method; the others are still compared
            row = {"name": name, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
