"""What each size of each unit costs in quality or time: error curves gathered as evidence,
measured divergence, latency, and whole plans.

May import the rooms from ``utils`` to ``apply``.
"""
