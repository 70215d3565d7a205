"""Files on disk: parsing what strangers may have written, schemas, safetensors read and
written piece by piece, the cache, and the folder of a run.

May import ``utils``, ``layers`` and ``families``.
"""
