"""What people read of a finished run: the report and its tables, the model card, the
frontier of several runs, the HTML page, the upload.

May import the rooms from ``utils`` to ``evaluate``.
"""
