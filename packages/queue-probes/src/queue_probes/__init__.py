"""Know within a minute that a queue does not move, and why.

    beat: probe.py --one message a queue--> broker --> any worker of the queue: "it arrived"
      |                                                     |
      +------------------> rows (models.py) <---------------+---- nodes.py: each worker, every 5 s
                               |
    diagnosis.py: rows -> a verdict for each queue; views.py, metrics.py, incidents.py: who is told
    status.py: the page for staff; jobsample.py: what it knows of durable jobs over time

The rows are facts, written by those who know them: when beat looked last, what the broker said to
it, which probe is on its way since when, which workers live, when a task of the queue started last.
Whoever asks only reads them, so an answer takes milliseconds though every worker is dead.
"""
