"""A package, so that ranks which a test starts import its functions from here: NeMo's wheel brings a package
``tests`` of its own, which would hide a folder without this file."""
