"""`memlayers bench`: what the memory layer costs on this machine, against baselines and the machine's own limits.

shapes  what is measured         baselines  what it is compared with      limits  what the machine can do
gate    is it right?             timing     interleaved rounds            machine threads, memory, device
cases   one figure after another training   steps that share one table    peak    memory, in processes of their own
report  table and plots          run        the whole of it
"""
