"""`distcnn verify`: prove on a user's own config and data that training is the same run on any number of processes.

Short runs of the real trainer are started as real processes (launch.py), each records what it does (worker.py,
record.py), and the records are compared with each other and with plain loops that share nothing with the trainer's
sums (reference.py). What is demanded stands in data_checks.py, sum_checks.py and run_checks.py.
"""
