"""The scripts here make golden values; they are run by hand, not collected."""

collect_ignore_glob = ["make_*.py"]
