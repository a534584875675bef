package startup

import (
	"path"
	"regexp"
	"strings"
)

// option returns what follows an option among arguments.
func option(args []string, name string) string {
	for i, a := range args {
		if a == name && i+1 < len(args) {
			return args[i+1]
		}
	}
	return ""
}

var nginxDirective = regexp.MustCompile(`(?m)^[ \t]*(?:[\w]+[ \t]*\{[ \t]*)?(include|load_module|ssl_certificate|ssl_certificate_key|ssl_dhparam|auth_basic_user_file)[ \t]+"?([^;"\n]+)"?;`)

// maxIncludes bounds the files of one configuration.
const maxIncludes = 1000

// nginx takes the configuration with what it includes, and the modules that it loads.
func (f *finder) nginx(p *program, depth int) {
	conf := option(p.args, "-c")
	for _, at := range []string{"/etc/nginx/nginx.conf", "/usr/local/nginx/conf/nginx.conf", "/usr/local/openresty/nginx/conf/nginx.conf", "/opt/bitnami/nginx/conf/nginx.conf"} {
		if conf == "" && f.regular(at) != nil {
			conf = at
		}
	}
	dir := path.Dir(conf)
	prefixes := []string{option(p.args, "-p"), dir, "/usr/share/nginx", "/etc/nginx", path.Dir(dir)}
	todo := []string{conf}
	for i := 0; i < len(todo) && i < maxIncludes; i++ {
		n := f.regular(todo[i])
		if n == nil || f.whole[n] {
			continue
		}
		f.takeWhole(n)
		for _, m := range nginxDirective.FindAllSubmatch(f.text(n), maxIncludes) {
			value := strings.TrimSpace(string(m[2]))
			for _, prefix := range prefixes {
				at := value
				if !path.IsAbs(at) {
					at = path.Join("/", prefix, at)
				}
				found := false
				for _, at := range f.glob(at) {
					n, real := f.lookup(at)
					if n == nil || !isRegular(n) {
						continue
					}
					found = true
					switch string(m[1]) {
					case "include":
						todo = append(todo, at)
					case "load_module":
						f.plugin(n, real, "")
					default:
						f.takeWhole(n)
					}
				}
				if found {
					break
				}
			}
		}
	}
}

// postgres takes what the server reads of its cluster, or what initdb reads where the image has none.
func (f *finder) postgres(p *program, depth int) {
	version := path.Base(path.Dir(path.Dir(p.real)))
	shares := []string{"/usr/share/postgresql/" + version, "/usr/local/share/postgresql", "/usr/share/postgresql"}
	for _, share := range shares {
		f.takeAll(share+"/timezonesets/Default", share+"/timezone/GMT")
	}
	data := f.env["PGDATA"]
	if d := option(p.args, "-D"); d != "" {
		data = d
	}
	if data == "" || f.regular(data+"/PG_VERSION") == nil {
		for _, share := range shares {
			f.takeAll(share+"/postgres.bki", share+"/*.sql", share+"/*.sample", share+"/sql_features.txt")
		}
		f.command([]string{path.Join(path.Dir(p.path), "initdb")}, depth+1)
		return
	}
	f.takeAll(data+"/*", data+"/global/*", data+"/pg_logical/*", data+"/pg_multixact/*/*", data+"/pg_xact/*", data+"/pg_subtrans/*", data+"/pg_stat/*")
	for _, at := range f.glob(data + "/pg_wal/0*") {
		if n := f.regular(at); n != nil {
			f.take(n, 0, 1) // its first page; where the last checkpoint is, only pg_control knows
		}
	}
	// The catalogs that every connection reads, of the last database: "postgres".
	if dbs := f.glob(data + "/base/*"); len(dbs) > 0 {
		for _, relation := range strings.Fields(pgCatalogs) {
			f.takeAll(dbs[len(dbs)-1] + "/" + relation)
		}
	}
}

// pgCatalogs are the relations that a backend opens to fill its caches, by their numbers, which do not change between versions.
const pgCatalogs = "PG_VERSION pg_filenode.map 1247 1249 1259 2600 2601 2603 2605 2610 2612 2615 2616 2650 2654 2655 2656 2657 2658 2659 2662 2663 2679 2680 2684 2685 2686 2687 2703"

// java takes what every start of a HotSpot reads, and the program's archives.
func (f *finder) java(p *program, depth int) {
	home := path.Dir(path.Dir(p.real))
	lib := home + "/lib"
	f.takeAll(lib+"/jvm.cfg", home+"/conf/security/java.security", home+"/release", lib+"/server/classes.jsa")
	for _, name := range []string{"/server/libjvm.so", "/libjimage.so", "/libjava.so", "/libzip.so", "/libnio.so", "/libnet.so"} {
		if n, real := f.lookup(lib + name); n != nil && isRegular(n) {
			f.plugin(n, real, "JNI_")
		}
	}
	if n := f.regular(lib + "/modules"); n != nil {
		f.take(n, 0, 1<<20) // the table of what is in it
	}
	archives := option(p.args, "-cp") + ":" + option(p.args, "-classpath") + ":" + option(p.args, "-jar") + ":" + f.env["CLASSPATH"]
	for _, at := range strings.Split(archives, ":") {
		if at != "" {
			f.takeAll(path.Join(f.workingDir, "/", strings.Replace(at, "/*", "/*.jar", 1)))
		}
	}
}

// php takes the configuration and the extensions that it loads, and the script.
func (f *finder) php(p *program, depth int) {
	for _, conf := range []string{"/usr/local/etc/php/php.ini", "/usr/local/etc/php/conf.d/*.ini", "/etc/php/*/cli/php.ini", "/etc/php/*/cli/conf.d/*.ini",
		"/usr/local/etc/php-fpm.conf", "/usr/local/etc/php-fpm.d/*.conf", "/etc/php/*/fpm/*.conf", "/etc/php/*/fpm/pool.d/*.conf"} {
		for _, at := range f.glob(conf) {
			n := f.regular(at)
			f.takeWhole(n)
			for line := range strings.Lines(string(f.text(n))) {
				k, v, _ := strings.Cut(line, "=")
				if k = strings.TrimSpace(k); k != "extension" && k != "zend_extension" {
					continue
				}
				name := path.Base(strings.Trim(strings.TrimSpace(v), `"`))
				for _, dir := range []string{"/usr/local/lib/php/extensions/*/", "/usr/lib/php/2*/"} {
					for _, at := range append(f.glob(dir+name), f.glob(dir+name+".so")...) {
						if n, real := f.lookup(at); n != nil && isRegular(n) {
							f.plugin(n, real, "get_module")
						}
					}
				}
			}
		}
	}
	for _, a := range p.args {
		if strings.HasSuffix(a, ".php") || a == "artisan" {
			f.takeAll(path.Join(f.workingDir, a), a)
		}
	}
}
