# Prefect's server with the SQLAlchemy of the lock: from 2.1 on, Prefect 3.8.8 makes no scheduled run.
#
#   docker build -f deploy/server.Dockerfile -t ttt3r-server:3.8.8 deploy
FROM prefecthq/prefect:3.8.8-python3.11
RUN python -m pip install --no-cache-dir sqlalchemy==2.0.58
