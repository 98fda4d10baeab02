"""How much memory of its own a process holds of a model that FSDP2 shards, on CPUs.

    python tests/support/shard_memory.py MODEL PROCESSES

MODEL is a directory of safetensors files. Files that are mapped are no memory of a process' own.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh

import prunelight
from prunelight.recovery.sharded_weights import shard


def own_memory():
    """Return the bytes of this process that are no file."""
    with open("/proc/self/smaps_rollup", encoding="utf-8") as parts:
        (line,) = (line for line in parts if line.startswith("Anonymous:"))
    return 1024 * int(line.split()[1])


def from_rank_zero(value):
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def work(rank, size, name, root):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=size
    )
    mesh, before = init_device_mesh("cpu", (size,)), own_memory()
    model, _ = prunelight.load(name)
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    loaded = own_memory() - before
    shard(model, mesh, from_rank_zero)
    shares = [loaded / weights, (own_memory() - before) / weights]
    sys.stdout.write(
        "rank {}: loaded {:.2f}, sharded {:.2f} of the weights\n".format(rank, *shares)
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[2])
    with tempfile.TemporaryDirectory() as root:
        processes.start_processes(work, (size, sys.argv[1], root), size, start_method="spawn")
