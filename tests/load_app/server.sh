#!/bin/sh
# Makes a server ready for its first deploy: server.sh APP DATABASE_PORT BROKER_PORT WEB_PORT PASSWORD
set -e
home=/srv/$1
as_postgres() { runuser -u postgres -- psql -q -p "$database" -v ON_ERROR_STOP=1 "$@"; }
database=$2

systemctl stop postgresql valkey-server
sed -i "s/^port = .*/port = $database/" /etc/postgresql/*/main/postgresql.conf
sed -i "s/^port .*/port $3/; s/^appendonly .*/appendonly yes/" /etc/valkey/valkey.conf
systemctl start postgresql valkey-server
for _ in $(seq 50); do as_postgres -c '' && break; sleep 0.2; done
as_postgres -c "CREATE ROLE app LOGIN PASSWORD '$5'" -c "CREATE DATABASE app OWNER app"

source=$(dirname "$(dirname "$(readlink -f "$0")")")
git config --global --add safe.directory "$source"
"$source/deploy/deploy" init
cat >"$home/env" <<END
WEB_LISTEN=127.0.0.1:$4
DATABASE_URL=postgres://app:$5@127.0.0.1:$database/app
CELERY_BROKER_URL=redis://127.0.0.1:$3/0
DJANGO_SECRET_KEY=$(head -c 50 /dev/urandom | base64 -w 0)
DJANGO_ALLOWED_HOSTS=127.0.0.1
DJANGO_SECURE_SSL_REDIRECT=0
FLOWER_BASIC_AUTH=ops:$5
END
