"""Does CR-SAM regularize, and does its C(w) predict generalization? The paper's claims, measured on small problems.

    make experiments                          # the full form; about an hour on two cores
    python -m benchmarks.experiments --quick  # fewer epochs, values of rho, seeds and checkpoints

============  =======================================================================
``tasks``     data, networks and base optimizers
``methods``   the compared methods, and the values of rho for tuning
``runs``      one training run with its measurements; runs in parallel, with a cache
``analysis``  means and errors, rank correlations, the bootstrap over runs
``report``    tables and figures
``__main__``  the program: tune on a validation split, run, report
============  =======================================================================
"""
