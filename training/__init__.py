"""The one training loop of the project, and what it needs: its step, its data order, its states, its log, its flags."""
