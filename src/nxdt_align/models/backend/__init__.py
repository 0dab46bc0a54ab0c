"""Any causal model of transformers, by transformers' own class, with our attention by key intervals.

``config`` says what model it is, ``model`` is the module that an engine trains, ``attention`` our function
in transformers' attention interface, ``probe`` the check at the start, ``files`` the way from and to
checkpoints. This folder alone, of the room ``models``, imports transformers.
"""
