"""One of several processes that time ``mx.distributed.all_sum``: ``python -m scripts.study.all_reduces BYTES…``.

The first prints the least seconds of seven for each size, as JSON.
"""

import json
import sys
import time

import mlx.core as mx

group = mx.distributed.init(strict=True, backend="ring")
least = []
for size in map(int, sys.argv[1:]):
    array, seconds = mx.ones(size // 4), []
    mx.eval(array)
    for _ in range(7):
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))  # all are there
        started = time.perf_counter()
        mx.eval(mx.distributed.all_sum(array, group=group))
        seconds.append(time.perf_counter() - started)
    least.append(min(seconds))
if group.rank() == 0:
    print(json.dumps(least))
