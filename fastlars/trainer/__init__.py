"""Reference trainer: ResNets on image folders or scikit-learn's digits, with fastlars' optimizers.

Run it with ``python -m fastlars.trainer``, or under ``torchrun`` for more than one process;
``--help`` lists the settings.
"""
