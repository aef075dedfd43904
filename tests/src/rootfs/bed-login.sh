#!/bin/sh
# The login shell of the user "bed": from here on the terminal carries commands and answers, and only a panic may cut in.
export TERM=dumb PATH=/run/bed:/usr/local/sbin:/usr/sbin:/usr/bin HOME=/root
dmesg -n 1
stty raw -echo
exec sh /etc/agent
