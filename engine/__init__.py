"""What the programs share: a package for each concern, and below them the ground floor.

Imports run one way, downwards (`lint-imports` holds it):

    command                the command line, up to main()
    pictures               what people look at
    training               what an epoch is made of
    data | run             from files to batches | a run's folder and all that is kept in it
    config | build         settings: read and checked | what a `_target_` names is called
    terminal | files       what is printed | what is read and written
    distributed            the processes of one run, and what they tell each other
    errors                 the ways a run ends
"""
