"""`python -m losa_deploy` is `losa-deploy`."""

import sys

from losa_deploy.cli.main import main

sys.exit(main())
