package wire

import "fmt"

// The bodies, one pair of functions a message, fields in the order of the
// struct. PROTOCOL.md has the encoding of each kind of field.

func (*Hello) Type() Type { return TypeHello }

func (m *Hello) appendBody(b []byte) []byte {
	b = appendU32(b, m.Version)
	b = append(b, byte(m.Role))
	return append(b, m.Session[:]...)
}

func (m *Hello) readBody(d *decoder) {
	m.Version = d.checkVersion(true)
	if m.Role = Role(d.atMost(d.u8(), uint8(RoleShareChanges), "role")); m.Role == 0 {
		d.fail("unknown role 0")
	}
	m.Session = d.session()
}

func (*Ready) Type() Type { return TypeReady }

func (m *Ready) appendBody(b []byte) []byte {
	b = appendU32(b, m.Version)
	b = appendString(b, m.KernelRelease)
	b = appendU64(b, m.BootNanos)
	return appendU64(b, m.InitNanos)
}

func (m *Ready) readBody(d *decoder) {
	m.Version = d.checkVersion(false)
	m.KernelRelease = d.text()
	m.BootNanos = d.u64()
	m.InitNanos = d.u64()
}

func (*StartDistro) Type() Type { return TypeStartDistro }

func (m *StartDistro) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	b = appendString(b, m.Name)
	b = appendU32(b, uint32(m.Slot))
	b = appendString(b, m.Hostname)
	b = appendString(b, m.Hosts)
	b = appendBool(appendBool(b, m.Checked), m.ReadOnly)
	b = appendU32(b, uint32(len(m.Shares)))
	for _, s := range m.Shares {
		b = appendBool(appendString(appendString(b, s.Host), s.Guest), s.ReadOnly)
	}
	b = appendString(b, m.User)
	b = appendString(b, m.Timezone)
	b = appendBool(b, m.SafeMode)
	b = appendU64(b, m.Limits.MemoryBytes)
	b = appendU32(b, m.Limits.MilliCPUs)
	b = appendU32(b, m.Limits.PIDs)
	b = appendString(appendString(appendBool(b, m.OwnNetwork), m.Own4), m.Own6)
	b = appendU32(b, uint32(len(m.Certificates)))
	for _, c := range m.Certificates {
		b = appendString(b, c)
	}
	return b
}

func (m *StartDistro) readBody(d *decoder) {
	m.ID = d.u32()
	m.Name = d.string()
	m.Slot = int32(d.u32())
	m.Hostname = d.string()
	m.Hosts = d.string()
	m.Checked = d.bool()
	m.ReadOnly = d.bool()
	for range d.length(9) {
		m.Shares = append(m.Shares, Share{d.string(), d.string(), d.bool()})
	}
	m.User = d.string()
	m.Timezone = d.string()
	m.SafeMode = d.bool()
	m.Limits = Limits{MemoryBytes: d.u64(), MilliCPUs: d.u32(), PIDs: d.u32()}
	m.OwnNetwork, m.Own4, m.Own6 = d.bool(), d.string(), d.string()
	for range d.length(4) {
		m.Certificates = append(m.Certificates, d.string())
	}
}

func (*StopDistro) Type() Type { return TypeStopDistro }

func (m *StopDistro) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	b = appendString(b, m.Name)
	b = appendBool(b, m.IfIdle)
	return appendU32(b, m.GraceMillis)
}

func (m *StopDistro) readBody(d *decoder) {
	m.ID = d.u32()
	m.Name = d.string()
	m.IfIdle = d.bool()
	m.GraceMillis = d.u32()
}

func (*Import) Type() Type { return TypeImport }

func (m *Import) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	b = appendU32(b, uint32(m.Slot))
	return append(b, m.Archive[:]...)
}

func (m *Import) readBody(d *decoder) {
	m.ID = d.u32()
	m.Slot = int32(d.u32())
	m.Archive = d.session()
}

func (*Export) Type() Type { return TypeExport }

func (m *Export) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	b = appendU32(b, uint32(m.Slot))
	return append(b, m.Archive[:]...)
}

func (m *Export) readBody(d *decoder) {
	m.ID = d.u32()
	m.Slot = int32(d.u32())
	m.Archive = d.session()
}

func (*Maintain) Type() Type { return TypeMaintain }

func (m *Maintain) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	b = appendU32(b, uint32(m.Slot))
	b = append(b, byte(m.Task))
	b = appendU64(b, m.Bytes)
	return append(b, m.Archive[:]...)
}

func (m *Maintain) readBody(d *decoder) {
	m.ID = d.u32()
	m.Slot = int32(d.u32())
	if m.Task = Task(d.atMost(d.u8(), uint8(TaskPreen), "task")); m.Task == 0 {
		d.fail("unknown task 0")
	}
	m.Bytes = d.u64()
	m.Archive = d.session()
}

func (*MountDisk) Type() Type { return TypeMountDisk }

func (m *MountDisk) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	b = appendU32(b, uint32(m.Slot))
	b = appendU32(b, m.Partition)
	b = appendString(b, m.Name)
	b = appendString(b, m.FSType)
	return appendString(b, m.Options)
}

func (m *MountDisk) readBody(d *decoder) {
	m.ID = d.u32()
	m.Slot = int32(d.u32())
	m.Partition = d.u32()
	m.Name = d.string()
	m.FSType = d.string()
	m.Options = d.string()
}

func (*ReleaseDisk) Type() Type { return TypeReleaseDisk }

func (m *ReleaseDisk) appendBody(b []byte) []byte {
	return appendU32(appendU32(b, m.ID), uint32(m.Slot))
}

func (m *ReleaseDisk) readBody(d *decoder) {
	m.ID = d.u32()
	m.Slot = int32(d.u32())
}

func (*SwapOn) Type() Type { return TypeSwapOn }

func (m *SwapOn) appendBody(b []byte) []byte {
	return appendU32(appendU32(b, m.ID), uint32(m.Slot))
}

func (m *SwapOn) readBody(d *decoder) {
	m.ID = d.u32()
	m.Slot = int32(d.u32())
}

func (*Shutdown) Type() Type { return TypeShutdown }

func (m *Shutdown) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	return appendU32(b, m.GraceMillis)
}

func (m *Shutdown) readBody(d *decoder) {
	m.ID = d.u32()
	m.GraceMillis = d.u32()
}

func (*Reply) Type() Type { return TypeReply }

func (m *Reply) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	b = appendU16(b, uint16(m.Code))
	b = appendString(b, m.Text)
	return appendU32(b, m.Port)
}

func (m *Reply) readBody(d *decoder) {
	m.ID = d.u32()
	m.Code = Code(d.u16())
	m.Text = d.text()
	m.Port = d.u32()
}

func (*ImportReady) Type() Type { return TypeImportReady }

func (m *ImportReady) appendBody(b []byte) []byte {
	b = appendU32(b, m.ID)
	return appendU32(b, m.Port)
}

func (m *ImportReady) readBody(d *decoder) {
	m.ID = d.u32()
	m.Port = d.u32()
}

func (*DistroExited) Type() Type { return TypeDistroExited }

func (m *DistroExited) appendBody(b []byte) []byte {
	return appendString(appendString(b, m.Name), m.Text)
}

func (m *DistroExited) readBody(d *decoder) {
	m.Name = d.string()
	m.Text = d.text()
}

func (*DistroIdle) Type() Type { return TypeDistroIdle }

func (m *DistroIdle) appendBody(b []byte) []byte { return appendString(b, m.Name) }

func (m *DistroIdle) readBody(d *decoder) { m.Name = d.string() }

func (*Start) Type() Type { return TypeStart }

func (m *Start) appendBody(b []byte) []byte {
	b = append(b, byte(m.Shell))
	b = appendStrings(b, m.Argv)
	b = appendString(b, m.User)
	b = appendString(b, m.Default)
	b = appendString(b, m.Cwd)
	b = appendStrings(b, m.Env)
	b = append(b, byte(m.Streams))
	return appendBool(m.Size.append(b), m.Agent)
}

func (m *Start) readBody(d *decoder) {
	m.Shell = Shell(d.atMost(d.u8(), uint8(ShellLogin), "shell mode"))
	m.Argv = d.strings()
	m.User = d.string()
	m.Default = d.string()
	m.Cwd = d.string()
	m.Env = d.strings()
	const all = StreamStdin | StreamStdout | StreamStderr | StreamPTY
	m.Streams = Streams(d.atMost(d.u8(), uint8(all), "streams"))
	m.Size.read(d)
	m.Agent = d.bool()
}

func (*Started) Type() Type { return TypeStarted }

func (m *Started) appendBody(b []byte) []byte {
	return appendString(appendU32(b, m.PID), m.Notice)
}

func (m *Started) readBody(d *decoder) {
	m.PID = d.u32()
	m.Notice = d.text()
}

func (*Failed) Type() Type { return TypeFailed }

func (m *Failed) appendBody(b []byte) []byte {
	return appendString(appendU16(b, uint16(m.Code)), m.Text)
}

func (m *Failed) readBody(d *decoder) {
	m.Code = Code(d.u16())
	m.Text = d.text()
}

func (*Resize) Type() Type { return TypeResize }

func (m *Resize) appendBody(b []byte) []byte { return m.Size.append(b) }

func (m *Resize) readBody(d *decoder) { m.Size.read(d) }

func (*Signal) Type() Type { return TypeSignal }

func (m *Signal) appendBody(b []byte) []byte { return append(b, m.Number) }

func (m *Signal) readBody(d *decoder) { m.Number = d.u8() }

func (*Exited) Type() Type { return TypeExited }

func (m *Exited) appendBody(b []byte) []byte {
	b = append(b, m.Status, m.Signal)
	b = appendU64(b, m.StdoutBytes)
	b = appendU64(b, m.StderrBytes)
	return appendU64(b, m.PTYBytes)
}

func (m *Exited) readBody(d *decoder) {
	m.Status = d.u8()
	m.Signal = d.u8()
	m.StdoutBytes = d.u64()
	m.StderrBytes = d.u64()
	m.PTYBytes = d.u64()
}

func (*HostExec) Type() Type { return TypeHostExec }

func (m *HostExec) appendBody(b []byte) []byte {
	return appendString(append(append(b, m.Session[:]...), byte(m.Kind)), m.Distro)
}

func (m *HostExec) readBody(d *decoder) {
	m.Session = d.session()
	m.Kind = HostKind(d.atMost(d.u8(), uint8(HostAgent), "kind of host program"))
	m.Distro = d.string()
}

func (*MountShare) Type() Type { return TypeMountShare }

func (m *MountShare) appendBody(b []byte) []byte {
	b = appendString(append(b, m.Session[:]...), m.Guest)
	return appendBool(appendString(appendU32(appendU32(b, m.UID), m.GID), m.Distro), m.Stream)
}

func (m *MountShare) readBody(d *decoder) {
	m.Session = d.session()
	m.Guest = d.string()
	m.UID = d.u32()
	m.GID = d.u32()
	m.Distro = d.string()
	m.Stream = d.bool()
}

func (*WatchPorts) Type() Type { return TypeWatchPorts }

func (*WatchPorts) appendBody(b []byte) []byte { return b }

func (*WatchPorts) readBody(*decoder) {}

func (*PortsOpen) Type() Type { return TypePortsOpen }

func (m *PortsOpen) appendBody(b []byte) []byte {
	b = appendU32(b, uint32(len(m.Ports)))
	for _, p := range m.Ports {
		b = appendBool(appendBool(appendBool(appendString(b, p.Distro), p.UDP), p.V4), p.V6)
		b = appendU16(b, p.Number)
	}
	return b
}

func (*Serving) Type() Type { return TypeServing }

func (m *Serving) appendBody(b []byte) []byte {
	b = appendU32(appendU32(appendU32(b, m.UID), m.GID), uint32(len(m.Groups)))
	for _, g := range m.Groups {
		b = appendU32(b, g)
	}
	return b
}

func (m *Serving) readBody(d *decoder) {
	m.UID = d.u32()
	m.GID = d.u32()
	for range d.length(4) {
		m.Groups = append(m.Groups, d.u32())
	}
}

func (*RegisterDevice) Type() Type { return TypeRegisterDevice }

func (m *RegisterDevice) appendBody(b []byte) []byte {
	return appendString(appendU32(b, m.ID), m.Device)
}

func (m *RegisterDevice) readBody(d *decoder) {
	m.ID = d.u32()
	m.Device = d.string()
}

func (*ShareDevice) Type() Type { return TypeShareDevice }

func (m *ShareDevice) appendBody(b []byte) []byte { return appendString(b, m.Tag) }

func (m *ShareDevice) readBody(d *decoder) { m.Tag = d.string() }

func (*ShareChange) Type() Type { return TypeShareChange }

func (m *ShareChange) appendBody(b []byte) []byte {
	b = appendU32(append(b, m.Kind), m.Mode)
	return appendString(appendString(appendString(appendString(b, m.Dir), m.Name), m.NewDir), m.NewName)
}

func (m *ShareChange) readBody(d *decoder) {
	m.Kind, m.Mode = d.u8(), d.u32()
	m.Dir, m.Name, m.NewDir, m.NewName = d.string(), d.string(), d.string(), d.string()
}

func (*ShareRaised) Type() Type { return TypeShareRaised }

func (*ShareRaised) appendBody(b []byte) []byte { return b }

func (*ShareRaised) readBody(*decoder) {}

func (m *PortsOpen) readBody(d *decoder) {
	n := d.length(9)
	if n > MaxPorts {
		d.fail(fmt.Sprintf("%d ports, more than %d", n, MaxPorts))
		return
	}
	for range n {
		m.Ports = append(m.Ports, Port{d.string(), d.bool(), d.bool(), d.bool(), d.u16()})
	}
}

func (*DialPort) Type() Type { return TypeDialPort }

func (m *DialPort) appendBody(b []byte) []byte {
	return appendU16(appendBool(appendBool(b, m.UDP), m.V6), m.Number)
}

func (m *DialPort) readBody(d *decoder) {
	m.UDP = d.bool()
	m.V6 = d.bool()
	m.Number = d.u16()
}

func (s WindowSize) append(b []byte) []byte { return appendU16(appendU16(b, s.Rows), s.Cols) }

func (s *WindowSize) read(d *decoder) {
	s.Rows = d.u16()
	s.Cols = d.u16()
}

func (*Network) Type() Type { return TypeNetwork }

func (m *Network) appendBody(b []byte) []byte {
	b = appendString(b, m.Guest4)
	b = appendString(b, m.Gateway4)
	b = appendString(b, m.Guest6)
	return appendString(b, m.Gateway6)
}

func (m *Network) readBody(d *decoder) {
	m.Guest4 = d.string()
	m.Gateway4 = d.string()
	m.Guest6 = d.string()
	m.Gateway6 = d.string()
}

func (t Type) String() string {
	switch t {
	case TypeHello:
		return "Hello"
	case TypeReady:
		return "Ready"
	case TypeReply:
		return "Reply"
	case TypeStartDistro:
		return "StartDistro"
	case TypeStopDistro:
		return "StopDistro"
	case TypeImport:
		return "Import"
	case TypeShutdown:
		return "Shutdown"
	case TypeExport:
		return "Export"
	case TypeMaintain:
		return "Maintain"
	case TypeMountDisk:
		return "MountDisk"
	case TypeReleaseDisk:
		return "ReleaseDisk"
	case TypeSwapOn:
		return "SwapOn"
	case TypeImportReady:
		return "ImportReady"
	case TypeDistroExited:
		return "DistroExited"
	case TypeDistroIdle:
		return "DistroIdle"
	case TypeNetwork:
		return "Network"
	case TypeStart:
		return "Start"
	case TypeStarted:
		return "Started"
	case TypeFailed:
		return "Failed"
	case TypeResize:
		return "Resize"
	case TypeSignal:
		return "Signal"
	case TypeExited:
		return "Exited"
	case TypeHostExec:
		return "HostExec"
	case TypeMountShare:
		return "MountShare"
	case TypeWatchPorts:
		return "WatchPorts"
	case TypePortsOpen:
		return "PortsOpen"
	case TypeDialPort:
		return "DialPort"
	case TypeServing:
		return "Serving"
	case TypeRegisterDevice:
		return "RegisterDevice"
	case TypeShareDevice:
		return "ShareDevice"
	case TypeRemoveRoot:
		return "RemoveRoot"
	case TypeShareChange:
		return "ShareChange"
	case TypeShareRaised:
		return "ShareRaised"
	}
	return fmt.Sprintf("Type(%d)", uint8(t))
}

func (*RemoveRoot) Type() Type { return TypeRemoveRoot }

func (m *RemoveRoot) appendBody(b []byte) []byte { return appendU32(b, m.ID) }

func (m *RemoveRoot) readBody(d *decoder) { m.ID = d.u32() }
