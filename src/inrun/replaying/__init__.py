"""Replay: the value of every use of an example at the end of the run, by going back through a recorded run (design,
2.6).

recording.py   what a run keeps so that it can be repeated        store.py   its files
record.py      what it kept, read                                 trajectory.py   a step repeated, bit for bit
adjoint.py     a step backwards                                   passes.py   values, and the Hessian of a batch
walk.py        from the last step to the first                    book.py   values into the ledger
face.py        `inrun.replay`
"""
