"""What reruns the paper: its tables and findings, A.2, the selection of Sec. 4.3, and what a step costs."""
