#!/bin/sh
# A backend as LocalAI's are: an executable run.sh that takes --addr HOST:PORT. $ECHO_PYTHON has grpcio and the stubs.
exec "${ECHO_PYTHON:-python3}" backend.py "$@"
