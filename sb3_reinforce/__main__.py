"""The command line: ``python -m sb3_reinforce``, or ``sb3-reinforce``."""

from sb3_reinforce.tools.zoo import main

if __name__ == "__main__":
    main()
