collect_ignore = ["make_golden.py"]  # which needs torch
