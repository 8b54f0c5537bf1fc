"""`python -m dsmim …`: what launchers run (`deepspeed --module dsmim train …`, `srun python -m dsmim train …`)."""

import sys

from dsmim.cli.main import main

sys.exit(main())
