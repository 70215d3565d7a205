"""The command line: commands, options, tables and messages. Nothing heavy is imported
before a command needs it.

May import every room.
"""
