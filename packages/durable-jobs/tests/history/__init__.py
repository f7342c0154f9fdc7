"""What became of every row: recorded by triggers while tests run, held against the machine.

machine.py    the states and arrows, in data
recorder.py   triggers write each change to `job_history`; bodies write to files
checker.py    whole histories against the machine; how many bodies ran at once
"""
