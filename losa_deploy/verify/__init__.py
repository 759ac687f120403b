"""Whether a folder is what it says, and an artifact the model it was made from."""

from losa_deploy.stage_module import call_as_stage

call_as_stage(__name__)
