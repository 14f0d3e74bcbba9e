"""Previews: every git branch is a Space of its own. `python -m previews --help`; nothing here imports the rest."""
