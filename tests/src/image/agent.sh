# Serves one command a line: "ID COMMAND". The answer is framed by two lines that no program writes by chance.
printf '\n@ready\n'
while IFS= read -r line; do
  id=${line%% *}
  case $id in [0-9]*) ;; *) continue ;; esac
  printf '\n@<%s\n' "$id"
  (eval "${line#* }") </dev/null 2>&1
  printf '\n@>%s %d\n' "$id" $?
done
