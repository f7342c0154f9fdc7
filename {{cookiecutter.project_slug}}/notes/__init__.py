"""The example: people write notes and ask for copies, which workers make in the background.

Remove it: delete this folder, and the lines with `notes` in config/settings.py and config/urls.py.
"""
