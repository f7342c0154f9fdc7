"""The example: people write notes and ask for copies, which workers make in the background.

Remove it by deleting this folder and setting `EXAMPLE_APP = False` in `config/project.py`.
"""
