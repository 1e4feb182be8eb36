"""The paper's experiments: what each asks, the runs that answer it, and the report.

Read first, for what is run:

    experiment.py                what an experiment is: its question, its runs, what it concludes
    scales.py                    the sizes, budgets and rates of each scale, in one place
    depth.py, size.py, ...       an experiment each
    registry.py                  all of them by name

Then, for how:

    reproduce.py                 one experiment from its checks to its report
    grid.py  worker.py           the runs that are left, several at a time, each in a process of its own
    records.py                   finished runs on the disk, and what makes two runs the same
    points.py  write_up.py       runs become rows with errors; the report
    work.py                      how much work a run is, for estimates of time

`compare.py` and `report.py` are three models of one size, trained and reported with less.
"""
